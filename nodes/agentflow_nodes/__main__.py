"""`python -m agentflow_nodes`: the command line."""

from agentflow_nodes.cli import main

if __name__ == "__main__":
    main()
