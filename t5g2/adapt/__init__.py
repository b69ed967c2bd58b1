"""From a pretrained model to one of another kind: where every weight comes from, by rule."""
