"""The subcommands of `t5g2`, one file each, named as typed: flags and run(); `flags` declares and parses them."""
