"""Which features does a prompt use?"""
