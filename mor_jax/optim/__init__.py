"""Rules that methods run beside the optimiser; empty until the first method has one."""
