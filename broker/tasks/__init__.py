"""What a task is: its description, its checks, its states, when it is retried, and the context of a submission."""
