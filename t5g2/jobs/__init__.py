"""Work of subcommands that is neither training nor a report: each can be called from Python as well."""
