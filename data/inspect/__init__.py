"""Samples and packs for people: pages, contact sheets, and the check of every byte."""
