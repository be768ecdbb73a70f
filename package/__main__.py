"""`python -m pilotq`: the same as `pilotq`."""

from pilotq.cli.main import main

if __name__ == "__main__":
    main()
