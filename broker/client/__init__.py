"""What users and the command line call: `Broker`, `Executor`, submitting, queries of tasks and nodes, results."""
