"""rudalle"""
