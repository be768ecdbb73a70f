"""taskfiles"""
