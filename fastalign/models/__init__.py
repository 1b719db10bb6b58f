"""Models: loading, and the policy module around backbone and head."""
