"""The scripts, as the package `gnws_tools`: the same code for the command `gnws`."""
