//! The driver, a device, its stream, and the compiled kernels.

use std::ffi::{CStr, CString, c_char};
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

/// The compiled files of `kernels/cuda`: name and fatbin.
const MODULES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));

/// Bytes where the driver may read a fatbin's header.
#[repr(align(16))]
struct Aligned<T>(T);

/// The driver's interface that the kernels are compiled against.
const DRIVER_VERSION: i32 = 13_000;

/// Dynamic shared memory that a kernel may use without being told so.
const DEFAULT_SHARED_BYTES: u32 = 48 * 1024;

/// A device with one stream, on which everything runs in order.
///
/// Made, used and dropped on one thread, whose current context it is.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    properties: Properties,
    context: sys::CUcontext,
    held: Mutex<Held>,
}

/// While graphs exist, memory that was given up is kept: they have its addresses.
#[derive(Debug, Default)]
struct Held {
    graphs: usize,
    memory: Vec<sys::CUdeviceptr>,
}

// SAFETY: the driver's handles may be used from any thread. Only `free` can come from another than the one whose
// current context this is (a buffer dropped there); it makes the context current first.
unsafe impl Send for Context {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Context {}

/// What launchers want to know of a device.
#[derive(Debug, Clone)]
pub(crate) struct Properties {
    /// `cuda:0`.
    pub(crate) ordinal: usize,
    /// `NVIDIA H200`.
    pub(crate) name: String,
    /// Streaming multiprocessors.
    pub(crate) sm_count: u32,
    /// Most shared memory of a block, in bytes.
    pub(crate) max_shared_bytes: u32,
}

/// A kernel. Valid as long as its context.
#[derive(Debug, Clone)]
pub(crate) struct Function {
    pub(super) raw: sys::CUfunction,
    pub(super) name: &'static str,
    /// Bytes of each parameter.
    pub(super) parameters: Vec<usize>,
}

/// The error of a driver call, as a sentence.
pub(super) fn message(result: CUresult) -> String {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: `text` receives a static string, or null for an unknown code.
    unsafe {
        if sys::cuGetErrorString(result, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            return CStr::from_ptr(text).to_string_lossy().into_owned();
        }
    }
    format!("{result:?}")
}

/// Ends the process's use of a device whose state is lost: after a failed launch or copy nothing on it can be trusted.
///
/// # Panics
/// `result` is an error.
#[track_caller]
pub(super) fn check(result: CUresult, what: &str) {
    assert!(result == CUresult::CUDA_SUCCESS, "CUDA: {what}: {}", message(result));
}

fn success(result: CUresult) -> Result<(), String> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(message(result)) }
}

fn unavailable(ordinal: usize, why: String) -> Error {
    Error::Unavailable { device: format!("cuda:{ordinal}"), why }
}

/// Device `ordinal`, if it can run the kernels.
fn find(ordinal: usize) -> Result<(sys::CUdevice, Properties)> {
    // SAFETY: looks for the library, without running anything of it but its initializers.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(ordinal, "there is no NVIDIA driver (libcuda.so)".to_owned()));
    }
    describe(ordinal).map_err(|why| unavailable(ordinal, why))
}

fn describe(ordinal: usize) -> Result<(sys::CUdevice, Properties), String> {
    let (mut version, mut count, mut device) = (0, 0, 0);
    let mut name = [0; 128];
    // SAFETY: the library is there, and initialized first; everything is written to local variables of the sizes given.
    unsafe {
        success(sys::cuInit(0))?;
        success(sys::cuDriverGetVersion(&raw mut version))?;
        success(sys::cuDeviceGetCount(&raw mut count))?;
        if version < DRIVER_VERSION {
            let dotted = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
            let (is, needed) = (dotted(version), dotted(DRIVER_VERSION));
            return Err(format!("the driver supports CUDA {is}, but {needed} is needed"));
        }
        if ordinal >= count as usize {
            return Err(format!("the driver sees {count} device{}", if count == 1 { "" } else { "s" }));
        }
        success(sys::cuDeviceGet(&raw mut device, ordinal as i32))?;
        success(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
    }
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: the device exists; `value` is local.
        success(unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) })?;
        Ok::<_, String>(value as u32)
    };
    use sys::CUdevice_attribute as Attribute;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: the driver ends the name with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    if (major, minor) != (9, 0) {
        return Err(format!("{name} has compute capability {major}.{minor}; the kernels are made for 9.0"));
    }
    let properties = Properties {
        ordinal,
        name,
        sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        max_shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    };
    Ok((device, properties))
}

impl Context {
    /// Whether [`open`](Self::open) has a chance.
    pub(crate) fn check(ordinal: usize) -> Result<()> {
        find(ordinal).map(|_| ())
    }

    /// Opens device `ordinal` and loads the kernels.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let (device, properties) = find(ordinal)?;
        let or = |result| success(result).map_err(|why| unavailable(ordinal, why));
        let mut context = null_mut();
        // SAFETY: the device exists; `drop` releases what is retained here.
        or(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) })?;
        let (stream, modules, held) = (null_mut(), Vec::new(), Mutex::default());
        let mut this = Self { device, context, stream, modules, properties, held };
        // SAFETY: the context was just retained, and the stream is created in it.
        unsafe {
            or(sys::cuCtxSetCurrent(context))?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            or(sys::cuStreamCreate(&raw mut this.stream, flags))?;
        }
        for (file, fatbin) in MODULES {
            let mut module = null_mut();
            // SAFETY: the image is a whole fatbin, as nvcc wrote it.
            let result = unsafe { sys::cuModuleLoadData(&raw mut module, fatbin.as_ptr().cast()) };
            success(result).map_err(|why| unavailable(ordinal, format!("{file}: {why}")))?;
            this.modules.push(module);
        }
        Ok(this)
    }

    /// What kind of device it is.
    pub(crate) fn properties(&self) -> &Properties {
        &self.properties
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until everything that was launched has run.
    pub(crate) fn synchronize(&self) {
        // SAFETY: the stream is this context's.
        check(unsafe { sys::cuStreamSynchronize(self.stream) }, "synchronize");
    }

    /// Bytes of device memory: free, and all.
    pub(crate) fn memory_info(&self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes to two local variables.
        check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "memory info");
        (free, total)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees `memory`, now or after the last graph. Freeing waits for the device.
    pub(super) fn free(&self, memory: sys::CUdeviceptr) {
        let mut held = self.held();
        if held.graphs > 0 {
            held.memory.push(memory);
            return;
        }
        // SAFETY: allocated in this context, and given up by its owner.
        unsafe {
            check(sys::cuCtxSetCurrent(self.context), "set the context");
            check(sys::cuMemFree_v2(memory), "free memory");
        }
    }

    /// A graph is made: from now on memory that is dropped stays.
    pub(super) fn hold_memory(&self) {
        self.held().graphs += 1;
    }

    /// A graph is gone.
    pub(super) fn release_memory(&self) {
        let mut held = self.held();
        held.graphs -= 1;
        let memory = if held.graphs == 0 { std::mem::take(&mut held.memory) } else { Vec::new() };
        drop(held);
        memory.into_iter().for_each(|memory| self.free(memory));
    }

    /// The kernel `name`, ready to be launched with as much dynamic shared memory as the device allows. Loads its
    /// code; to be called when the device is opened, not between launches.
    ///
    /// # Panics
    /// There is no such kernel, or it spills to local memory: mistakes of this crate.
    pub(crate) fn function(&self, name: &'static str) -> Function {
        let symbol = CString::new(name).expect("a kernel's name has no zero");
        let mut raw = null_mut();
        // SAFETY: the modules are loaded; `raw` is local.
        let found = self.modules.iter().any(|&module| unsafe {
            sys::cuModuleGetFunction(&raw mut raw, module, symbol.as_ptr()) == CUresult::CUDA_SUCCESS
        });
        assert!(found, "no CUDA kernel {name}");
        use sys::CUfunction_attribute as Attribute;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the function was just found; `value` is local.
            check(unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, raw) }, name);
            value as u32
        };
        let local = attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
        assert!(local == 0, "the CUDA kernel {name} keeps {local} bytes in local memory");
        let fixed = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        let dynamic = self.properties.max_shared_bytes - fixed;
        if dynamic > DEFAULT_SHARED_BYTES {
            let limit = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            check(unsafe { sys::cuFuncSetAttribute(raw, limit, dynamic as i32) }, name);
        }
        let mut parameters = Vec::new();
        let (mut offset, mut size) = (0, 0);
        // SAFETY: as above; a number beyond the last parameter is answered by an error.
        while unsafe { sys::cuFuncGetParamInfo(raw, parameters.len(), &raw mut offset, &raw mut size) }
            == CUresult::CUDA_SUCCESS
        {
            parameters.push(size);
        }
        Function { raw, name, parameters }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made in `open`, and nothing that uses them outlives the context. Errors are of no use to anyone here.
        unsafe {
            let _ = sys::cuStreamSynchronize(self.stream);
            for &module in &self.modules {
                let _ = sys::cuModuleUnload(module);
            }
            if !self.stream.is_null() {
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
