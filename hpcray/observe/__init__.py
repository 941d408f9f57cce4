"""What a person sees of a running job: its logs, its state, its timeline."""
