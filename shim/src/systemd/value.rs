//! Values of a plan, as the D-Bus library has them.
use x_engine::plan;
use zbus::zvariant::{Array, ObjectPath, Signature, StructureBuilder, Value};

/// Converts a value.
///
/// Errors: a signature that the library does not take.
pub(super) fn convert(value: &plan::Value) -> zbus::Result<Value<'static>> {
    Ok(match value {
        plan::Value::Bool(value) => Value::Bool(*value),
        plan::Value::Byte(value) => Value::U8(*value),
        plan::Value::I16(value) => Value::I16(*value),
        plan::Value::U16(value) => Value::U16(*value),
        plan::Value::I32(value) => Value::I32(*value),
        plan::Value::U32(value) => Value::U32(*value),
        plan::Value::I64(value) => Value::I64(*value),
        plan::Value::U64(value) => Value::U64(*value),
        plan::Value::Double(value) => Value::F64(*value),
        plan::Value::Text(text) => Value::Str(text.clone().into()),
        plan::Value::Path(path) => Value::ObjectPath(ObjectPath::try_from(path.clone())?),
        plan::Value::Signature(text) => Value::Signature(signature(text)?),
        plan::Value::Array(element, values) => {
            let mut array = Array::new(&signature(element)?);
            values.iter().try_for_each(|value| array.append(convert(value)?).map_err(zbus::Error::from))?;
            Value::Array(array)
        }
        plan::Value::Tuple(values) => {
            let builder = values
                .iter()
                .try_fold(StructureBuilder::new(), |builder, value| Ok::<_, zbus::Error>(builder.append_field(convert(value)?)))?;
            Value::Structure(builder.build()?)
        }
        plan::Value::Variant(value) => Value::Value(Box::new(convert(value)?)),
    })
}

fn signature(text: &str) -> zbus::Result<Signature> {
    Signature::try_from(text).map_err(|error| zbus::Error::Variant(error.into()))
}
