"""Models: loading and saving, the policy on packed rows, its self-verification."""
