"""What users of AgentFlow call: the SDK and workflow files."""
