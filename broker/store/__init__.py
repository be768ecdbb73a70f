"""What is stored in Redis and in the journal: keys, connection, scripts, messages, and the resources of nodes."""
