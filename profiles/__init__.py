"""Data that ships with stree: GPU sheets, runtime tables, traces, tuned profiles, a demo pair."""
