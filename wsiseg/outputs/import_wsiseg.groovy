/**
 * Import the polygons that wsiseg wrote into QuPath (0.4 or newer).
 *
 * With a project open, every image of the project for which there is a file; otherwise the open
 * image. For an image slide.svs the file is slide.geojson or slide.geojson.gz in the folder that
 * is asked for, or given as the first argument:
 *
 *     QuPath script --project=my/project.qpproj --args=my/masks import_wsiseg.groovy
 *
 * Objects of an earlier prediction are replaced; all other objects stay as they are. An image that
 * holds objects of the very file already is left alone, as they may have been corrected since; to
 * take them from the file again, give "replace" as the second argument, or set replaceAll below to true.
 */

import groovy.json.JsonSlurper
import java.util.zip.GZIPInputStream
import qupath.lib.common.GeneralTools
import qupath.lib.io.PathIO
import qupath.lib.scripting.QP

replaceAll = false

/** The folder with the results: the first argument, else asked for; null when cancelled. */
def chooseFolder(List arguments) {
    if (arguments)
        return new File(arguments[0].toString())
    def title = "Folder with the .geojson files of wsiseg"
    try {  // QuPath 0.5 and newer
        return Class.forName("qupath.fx.dialogs.FileChoosers").promptForDirectory(title, null)
    } catch (ClassNotFoundException ignored) {  // QuPath 0.4
        return Class.forName("qupath.lib.gui.dialogs.Dialogs").promptForDirectory(title, null)
    }
}

/** Names under which results of an image may lie: as it is, and without .svs or .ome.tif. */
def stems(Collection names) {
    def found = new LinkedHashSet()
    for (name in names.findAll { it != null }) {
        def bare = name.replaceFirst(/\.[^.\s]+$/, "")
        found << name << bare << bare.replaceFirst(/(?i)\.ome$/, "") << GeneralTools.stripExtension(name)
    }
    return found
}

/** The newer of the files there are for an image, or null. */
def findFile(File folder, Collection names) {
    for (stem in stems(names)) {
        def files = [".geojson", ".geojson.gz"].collect { new File(folder, stem + it) }.findAll { it.isFile() }
        if (files)
            return files.max { it.lastModified() }
    }
    return null
}

/** File names of an image, from its locations. */
def fileNames(uris) {
    return uris.collect { it.path == null ? null : new File(it.path).name }
}

/** Whether an object came from wsiseg. */
def isOurs(object) {
    def data = object.respondsTo("getMetadata") ? object.getMetadata() :
        object.respondsTo("getMetadataMap") ? object.getMetadataMap() : [:]
    return data.keySet().any { it.toString().startsWith("wsiseg.") }
}

/** Whether the record beside a file tells of a slide of another size than the image. */
def isOfAnother(server, File file) {
    def record = new File(file.parentFile, file.name.replaceFirst(/\.geojson(\.gz)?$/, ".json"))
    if (!record.isFile())
        return false
    def size = new JsonSlurper().parse(record)?.mask?.level0_size
    return size != null && (size[0] != server.getWidth() || size[1] != server.getHeight())
}

/** Replace what was imported into an image earlier by the objects of a file; whether it was done. */
def importFile(imageData, File file) {
    def hierarchy = imageData.getHierarchy()
    if (isOfAnother(imageData.getServer(), file)) {
        println "${file.name}: is of a slide of another size, not imported"
        return false
    }
    def objects = file.withInputStream { stream ->
        PathIO.readObjectsFromGeoJSON(file.name.endsWith(".gz") ? new GZIPInputStream(stream) : stream)
    }
    def ids = objects.collect { it.getId() } as Set
    if (!replaceAll && hierarchy.getAnnotationObjects().any { it.getId() in ids }) {
        println "${file.name}: the image holds objects of this prediction, left as it is (argument replace: take this file)"
        return false
    }
    def old = hierarchy.getAnnotationObjects().findAll { isOurs(it) || it.getId() in ids }
    hierarchy.removeObjects(old, true)
    hierarchy.addObjects(objects)
    hierarchy.fireHierarchyChangedEvent(this)
    println "${file.name}: ${objects.size()} objects (${old.size()} of an earlier import replaced)"
    return true
}

def arguments = []
try {
    arguments = args as List
} catch (MissingPropertyException ignored) {
    // run from the script editor
}
replaceAll = replaceAll || (arguments.size() > 1 && arguments[1].toString() == "replace")
def folder = chooseFolder(arguments)
if (folder == null)
    return
if (!folder.isDirectory()) {
    println "${folder} is not a folder"
    return
}

def openImage = QP.getCurrentImageData()
def project = QP.getProject()
if (project == null) {
    if (openImage == null) {
        println "Open a project or an image first"
        return
    }
    def server = openImage.getServer()
    def file = findFile(folder, fileNames(server.getURIs()) + [server.getMetadata().getName()])
    if (file == null)
        println "No .geojson for ${server.getMetadata().getName()} in ${folder}"
    else
        importFile(openImage, file)
    return
}

def openEntry = openImage == null ? null : project.getEntry(openImage)
def missing = []
for (entry in project.getImageList()) {
    def file = findFile(folder, fileNames(entry.getURIs()) + [entry.getImageName()])
    if (file == null) {
        missing << entry.getImageName()
        continue
    }
    def isOpen = openEntry != null && entry.getID() == openEntry.getID()
    def imageData = isOpen ? openImage : entry.readImageData()
    if (importFile(imageData, file))
        entry.saveImageData(imageData)
    if (!isOpen)
        imageData.getServer().close()
}
if (missing)
    println "No .geojson in ${folder} for: ${missing.join(', ')}"
