"""Adaptation of pretrained decoder-only models to encoder-decoders, by rules that account for every weight."""
