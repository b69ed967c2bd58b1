"""Training: what a run is made of, and the loop that puts it together.

Read in this order: experiment (the settings, checked), optim (schedules, optimizers, what is decayed or frozen), state
and step (the pure update), then loop, which is the page that a run follows.
"""
