//! A run's folder and its report: self-contained HTML with curves, tables and settings.

mod chart;
mod folder;
mod page;
mod sweep;

pub use folder::{FolderError, Loaded, Row, RunFolder, Target, load};
pub use page::{Machine, RunReport, compare, render};
pub use sweep::sweep;
