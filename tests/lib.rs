//! Tests of the programs as a whole; see `main.rs`. Golden data is in `golden/`, the tests' real model in `models/`.
