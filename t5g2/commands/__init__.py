"""The subcommands of `t5g2`, one file each, named as typed."""
