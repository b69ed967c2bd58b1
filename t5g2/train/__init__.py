"""Training: the parts of a run, and the loop that joins them.

Read in this order: experiment (the settings, checked), optim (schedules, optimizers, weight decay, freezing), state
and step (the pure update), then loop, which runs all of it in order.
"""
