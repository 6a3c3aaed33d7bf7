"""What does a feature do, and where does it come from?"""
