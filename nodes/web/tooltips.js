// The widgets inside a dynamic combo bring their tooltip from the node's definition, which is English, and it goes before
// the translation. Without it, the translation is shown.
import { app } from "../../scripts/app.js"

const CATEGORY = "model/patch/SpargeAttn"
const TRANSLATED = ["zh", "zh-TW"]

app.registerExtension({
  name: "SpargeAttn.tooltips",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.category !== CATEGORY || !TRANSLATED.includes(app.extensionManager.setting.get("Comfy.Locale"))) return
    for (const [type, settings] of Object.values({ ...nodeData.input.required, ...nodeData.input.optional }))
      for (const option of (type === "COMFY_DYNAMICCOMBO_V3" && settings.options) || [])
        for (const inputs of Object.values(option.inputs))
          for (const input of Object.values(inputs)) delete input[1]?.tooltip
  }
})
