"""The pure domain: fold, plan, policies, DAGs. No IO, no clock, no dice."""
