"""The commands of `train-export`, a module a group: options in, results out. Only these print.

Exit statuses are those of `service.command_line`; `terminal` says which errors are mistakes of who
typed the command.
"""
