"""What a task is, its life in Redis, and who gets which cores."""
