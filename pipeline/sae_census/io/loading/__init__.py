"""What is loaded from disk or the hub: found, converted, proved whole; what libraries say while it loads."""
