"""Training of clusters: data, the model with trainable experts, the loop."""
