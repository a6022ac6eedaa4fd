"""Recorded runs: many short runs of the real engine, by one worker on this machine's GPU, kept in a folder.

FOLDER/plan.json lists the runs in their order; FOLDER/runs/NAME holds a run: its four files and transfers.parquet.
Rates are shares of the rate at which the simulator, with the profile measured on this machine, serves requests. A run's
folder appears when the run is complete, so an interrupted recording resumes with the first missing run and with the
plan's sizes of the cache. `harness.studies.agreement` compares the runs with their simulations.
"""
