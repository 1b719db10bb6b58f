"""What the linear ops share: the LM head between hidden states and logits, and its gradients."""
