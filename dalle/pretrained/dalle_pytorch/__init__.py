"""dalle_pytorch"""
