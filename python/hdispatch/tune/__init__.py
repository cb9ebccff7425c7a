"""Tuning: candidates collected and compiled anywhere, measured on a GPU, selected offline into config files.

Measuring (candidates, timings, measure and what that imports) needs neither the build wing nor a DSL.
"""
