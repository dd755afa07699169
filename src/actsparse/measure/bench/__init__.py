"""Decode speed, measured fairly: every contender in one run, in turns, beside what the memory can deliver.

``shapes`` makes random models of a named shape, ``peer`` writes and times llama.cpp files of the same shape, ``run``
times everything; the verb prints.
"""
