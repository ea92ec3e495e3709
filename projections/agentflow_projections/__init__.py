"""AgentFlow."""
