//! A run's folder and its report: self-contained HTML with curves, tables and settings.

mod chart;
mod crossing;
mod folder;
mod page;

pub use crossing::Crossing;
pub use folder::{FolderError, Loaded, Row, RunFolder, Target, load};
pub use page::{Machine, RunReport, compare, render};
