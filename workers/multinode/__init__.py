"""multinode"""
