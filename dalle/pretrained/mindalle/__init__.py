"""mindalle"""
