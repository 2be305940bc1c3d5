//! Every operator but `linear`.

mod attention;
mod rows;
mod sampling;
