"""The processes of one node, which launch, pin, watch, end and report tasks: worker, launchers, interpreters."""
