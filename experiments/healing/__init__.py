"""How a model was healed: the plan of a shipped adapter, and the command that trains and measures one."""
