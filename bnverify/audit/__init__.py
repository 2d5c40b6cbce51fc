"""``bnverify audit``: which faults in a user's own step would the user's own tests miss?"""
