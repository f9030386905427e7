"""The panel of gates: prototypes moving, and surgery on live gates."""
