"""On-policy training: rewards, advantages, and what else surrounds a rollout."""
