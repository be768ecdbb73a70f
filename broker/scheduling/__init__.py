"""The dispatcher: its inventory of nodes, placement of tasks, prefetching, and availability of nodes."""
