"""The scripts. Installed, they are the package gnws_tools, for the command ``gnws``."""
