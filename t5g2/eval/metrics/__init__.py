"""Metrics of evaluation: pure functions of host values, by name in catalogue.py.

metric      the interface: contributions of examples, scores, scores of resampled examples
intervals   bootstrap intervals of scores
losses      nats per token, perplexity, bits per byte
similarity  outputs against reference texts: exact match, token F1, ROUGE, BLEU, chrF
vqa         accuracy of visual question answering
labels      outputs against labels: accuracy, F1, Matthews correlation, Pearson, Spearman, AUC
choices     multiple choice by log-likelihood
catalogue   every metric by its name
"""
