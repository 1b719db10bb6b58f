"""What the loss compares the policy with: the frozen model, its log-probs, and the cache that keeps them."""
