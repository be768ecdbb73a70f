"""One pilot: its directory and lock, its server, and the supervisor with the processes it starts."""
