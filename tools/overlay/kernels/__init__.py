"""GPU code inside of compiled libraries: for which GPUs there is any, kernel by kernel."""
